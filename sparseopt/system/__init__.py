"""What the operating system gives: files and locks, memory, processes."""
