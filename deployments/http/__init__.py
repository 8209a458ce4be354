"""The HTTP edge: routes, bodies, answers, events, pictures, keys, the page."""
