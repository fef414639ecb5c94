"""What plugs into Keras: regularizers, callbacks, an initializer, a constraint, and whole models."""
