"""One file a subject: its shapes, the providers that compute it, and the fp64 equations that they are held to."""
