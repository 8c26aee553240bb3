"""What no paper speaks of: files that survive a crash, the state of a run, several processes, speed."""
