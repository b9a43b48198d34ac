"""One module a verb of `prottrans`; each is imported only when its verb is used."""
