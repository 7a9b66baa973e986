"""What optimum-cli reads at its start: the command ``optimum-cli export alignkd``.

``optimum`` is a namespace that several wheels share (PEP 420): no folder above this file may have an ``__init__.py``.
"""

from optimum.commands.export.base import ExportCommand

from export.optimum_command import AlignkdExportCommand

REGISTER_COMMANDS = [(AlignkdExportCommand, ExportCommand)]
