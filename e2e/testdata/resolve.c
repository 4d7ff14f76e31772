/* Prints the addresses that this program's C library finds for names, one a line. */
#include <netdb.h>
#include <stdio.h>

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list, *a;
		int err = getaddrinfo(argv[i], 0, &hints, &list);
		if (err) {
			printf("%s: %s\n", argv[i], gai_strerror(err));
			return 1;
		}
		for (a = list; a; a = a->ai_next) {
			char host[64];
			getnameinfo(a->ai_addr, a->ai_addrlen, host, sizeof host, 0, 0, NI_NUMERICHOST);
			printf("%s\n", host);
		}
		freeaddrinfo(list);
	}
	return 0;
}
