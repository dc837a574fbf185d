"""Headwater against its peers, on the same work; and what the weights' packing costs in quality."""
