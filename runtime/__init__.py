"""What the papers leave out: files that survive a crash, the state of a run, several processes, speed."""
