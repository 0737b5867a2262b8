"""The loop: configuration, budget, schedules, optimizer, step, reports."""

from prepare.arguments import begin

begin()
