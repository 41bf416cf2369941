"""Executors: where a step's plan is carried out."""
