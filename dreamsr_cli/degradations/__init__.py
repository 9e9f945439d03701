"""How good photos are made bad: pixel degradation for the removal stage (method.md, Training)."""
