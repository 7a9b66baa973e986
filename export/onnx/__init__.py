"""ONNX: graphs written node by node, external data in a stream."""
