"""Prediction on images of any kind and size: where frames come from, windows over them, and the files that come out."""
