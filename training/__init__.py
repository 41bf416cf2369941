"""How the built-in model is made: text, tokenizer, training, gates. `python -m training.build`."""
