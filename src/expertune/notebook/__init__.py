"""What a notebook shows: HTML of objects, and progress in one output. Knows rich and no torch."""
