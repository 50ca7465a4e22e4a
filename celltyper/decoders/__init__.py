"""Decoders: feature maps of an encoder to one map at image size."""
