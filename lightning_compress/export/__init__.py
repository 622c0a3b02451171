"""What ships: ONNX files, plain or int8, run once in ONNX Runtime before they are kept."""
