"""What optimum-cli reads at its start: the command ``optimum-cli export alignkd``.

``optimum`` is a namespace that several wheels share (PEP 420): no folder above this file may have an ``__init__.py``.
"""

from optimum.commands.export.base import ExportCommand

from export.optimum_command import AlignkdExportCommand

# An iterator, to be read once: optimum-cli asks for this module again for every copy of the file on the path, such as a
# checkout beside an installed alignkd, and cannot take a command twice.
REGISTER_COMMANDS = iter([(AlignkdExportCommand, ExportCommand)])
