"""Search in indexes over HTTP, and the page that searches."""
