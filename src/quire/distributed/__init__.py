"""What ranks exchange: results of a layer (groups), plans and answers (links)."""
