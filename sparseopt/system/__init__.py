"""Operating-system services: files and locks, memory, processes."""
