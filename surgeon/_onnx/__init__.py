"""ONNX out, and the check of ONNX files against models."""
