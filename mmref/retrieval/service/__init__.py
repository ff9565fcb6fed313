"""`mmref serve`: indexes behind HTTP and a page. `answering` answers from one index, `backend` runs it here or on Ray Serve,
`app` is the HTTP interface, `queries` what may be asked, `judging` keeps what clients judge, `guard` is what every request
passes first, `access` who asks, `limits` how much, `transfers` and `patience` who is given up, `server` starts and stops it
all."""
