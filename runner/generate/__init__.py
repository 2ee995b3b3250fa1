"""Text from a trained model: sampling, beams, streams."""
