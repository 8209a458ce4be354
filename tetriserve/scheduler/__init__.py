"""The brain: `RoundScheduler`, who is let in, the load, the profile that follows what is measured, what happened."""
