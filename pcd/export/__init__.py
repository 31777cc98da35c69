"""Runs in forms that others can use: one network file for any ONNX runtime, and a folder that can be published."""
