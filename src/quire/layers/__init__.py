"""The pieces of a decoder layer: linear, norm, rotary embedding, token embedding."""
