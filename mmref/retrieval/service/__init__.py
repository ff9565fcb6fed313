"""`mmref serve`: indexes behind HTTP and a page. `engine` answers from one index, `backend` runs it here or on Ray Serve,
`app` is the HTTP interface, `guard` what every request passes first, `server` starts and stops it all."""
