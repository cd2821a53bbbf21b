"""Where rows go: from attention workers to expert hosts and back, over pairwise links. Knows no model arithmetic."""
