"""Traces and what comes of them: made, played through the brain or against a server, summed up, drawn."""
