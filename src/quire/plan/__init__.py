"""What would happen: a simulator that runs the real scheduler, and a planner. Without torch."""
