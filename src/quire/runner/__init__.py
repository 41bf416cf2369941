"""From a `StepPlan` to tensors and back."""
