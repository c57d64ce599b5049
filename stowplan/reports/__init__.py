"""What a plan says, for people: pure functions of ``core.plan.Plan``; imports neither torch nor ray."""
