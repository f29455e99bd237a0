"""On-policy context distillation: knowledge in the context becomes knowledge in the weights."""
