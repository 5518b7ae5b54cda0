"""What other libraries need: training loops, and trackers of curves; a module for each."""
