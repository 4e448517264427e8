"""The user's images: found (`images`), turned into the network's input (`preprocess`), judged (`advisor`)."""
