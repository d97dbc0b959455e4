"""Gates: their arithmetic, what runs when they drop, and the forward that holds them."""
