// From a multiboot loader's 32-bit mode to 64-bit C++ with AVX-512 on, and AMX where it is: the first GiB mapped to
// itself, no interrupts.
.section .multiboot, "a"
.align 4
.long 0x1BADB002, 3, -(0x1BADB002 + 3)

.section .text.boot, "ax"
.code32
.global _start
_start:
    cli
    mov $stack_top, %esp
    mov $directory, %edi            // 512 pages of 2 MiB
    mov $0x83, %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    movl $0, 4(%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    mov $directory + 3, %eax
    mov %eax, pointers
    mov $pointers + 3, %eax
    mov %eax, top
    mov %cr4, %eax
    or $(1 << 5), %eax              // PAE
    mov %eax, %cr4
    mov $top, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx           // EFER.LME
    rdmsr
    or $(1 << 8), %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    lgdt descriptors_at
    ljmp $8, $long_mode

.code64
long_mode:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov %cr0, %rax
    and $~0xC, %rax                 // floating point is neither emulated nor another task's
    or $2, %rax
    mov %rax, %cr0
    mov %cr4, %rax
    or $(1 << 9 | 1 << 10 | 1 << 18), %rax  // SSE, its exceptions, XSAVE
    mov %rax, %cr4
    mov $0xD, %eax
    xor %ecx, %ecx
    cpuid
    and $0x600E7, %eax              // of x87, SSE, AVX, AVX-512 and tiles what there is
    xor %ecx, %ecx
    xor %edx, %edx
    xsetbv
    call run
2:  hlt
    jmp 2b

.align 16
descriptors:
    .quad 0, 0x00AF9A000000FFFF, 0x00AF92000000FFFF
descriptors_at:
    .word 23
    .long descriptors

.bss
.align 4096
top: .skip 4096
pointers: .skip 4096
directory: .skip 4096
.skip 1 << 20
.align 64
stack_top:

.section .note.GNU-stack, "", @progbits
