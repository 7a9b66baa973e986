"""Files of a data set in any format -> rows on demand; nothing here needs torch."""
