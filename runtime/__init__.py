"""What the papers leave out: files that survive a crash, runs, several processes, speed."""
