"""The loop: configuration, budget, schedules, optimizer, step, reports."""
