"""What one export needs of the machine: work folder, room, progress."""
