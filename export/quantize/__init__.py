"""Which codes and how many bits: methods that look at the weights or at calibration data, the same for every target."""
