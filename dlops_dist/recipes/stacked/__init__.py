"""The stages of q2: a stacked autoencoder that is trained layer by layer."""
