"""Model families and the decoder they share. Importing this package does not import torch."""
