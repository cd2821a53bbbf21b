"""One file per transport; all speak `links.link.Link`."""
