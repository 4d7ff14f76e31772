//go:build tools

package main

import _ "k8s.io/kubectl/pkg/validation" // beside it is the schema
