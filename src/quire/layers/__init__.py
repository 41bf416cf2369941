"""The parts of a model: attention, MLP, norm, linear, rotary embedding, token embedding."""
