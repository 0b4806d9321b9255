"""Pages in one file each: HTML without a network, and charts as SVG and PNG."""
