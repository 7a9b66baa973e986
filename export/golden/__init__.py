"""Golden vectors: recorded from the float and the stored weights, with what rounding alone moves."""
