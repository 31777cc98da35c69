"""From patch depths to pixels, and from pixels to numbers under a named protocol."""
