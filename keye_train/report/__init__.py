"""A run as one HTML page (``page.write_report``), and the page about its merge (``merge_page.write_merge_page``)."""
