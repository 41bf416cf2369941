"""Drafters: guesses at the tokens that come next, which the model then verifies in one step."""
