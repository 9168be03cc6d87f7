# Vivado 2022.2 or newer, after build_prj.tcl: vivado -mode batch -source vivado_design.tcl [-tclargs bitstream]
# A Zynq UltraScale+ processing system and the accelerator: its registers on M_AXI_HPM0_FPD, its ports on S_AXI_HP0 to HP3
# and HPC0, 128 bits each. Files for PYNQ: m3vit.bit and m3vit.hwh.
# Never run in the tool itself by the authors, who had no licence: please report what your version makes of it.
set here [file normalize [file dirname [info script]]]
source [file join $here project.tcl]

create_project -force m3vit_vivado [file join $here m3vit_vivado] -part $part
if {[llength [get_board_parts -quiet $board_part]]} { set_property board_part $board_part [current_project] }
set_property ip_repo_paths [file join $here ${project_name}_prj/solution1/impl/ip] [current_project]
update_ip_catalog

create_bd_design design_1
set ps [create_bd_cell -type ip -vlnv xilinx.com:ip:zynq_ultra_ps_e zynq_ps]
if {[llength [get_board_parts -quiet $board_part]]} {
    apply_bd_automation -rule xilinx.com:bd_rule:zynq_ultra_ps_e -config {apply_board_preset "1"} $ps
}
set megahertz [expr {int(1000.0 / $clock_period)}]
set_property -dict [list \
    CONFIG.PSU__USE__M_AXI_GP0 {1} CONFIG.PSU__USE__M_AXI_GP1 {0} CONFIG.PSU__USE__M_AXI_GP2 {0} \
    CONFIG.PSU__USE__S_AXI_GP0 {1} CONFIG.PSU__SAXIGP0__DATA_WIDTH {128} \
    CONFIG.PSU__USE__S_AXI_GP1 {1} CONFIG.PSU__SAXIGP1__DATA_WIDTH {128} \
    CONFIG.PSU__USE__S_AXI_GP2 {1} CONFIG.PSU__USE__S_AXI_GP3 {1} \
    CONFIG.PSU__USE__S_AXI_GP4 {1} CONFIG.PSU__USE__S_AXI_GP5 {1} \
    CONFIG.PSU__SAXIGP2__DATA_WIDTH {128} CONFIG.PSU__SAXIGP3__DATA_WIDTH {128} \
    CONFIG.PSU__SAXIGP4__DATA_WIDTH {128} CONFIG.PSU__SAXIGP5__DATA_WIDTH {128} \
    CONFIG.PSU__FPGA_PL0_ENABLE {1} CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ $megahertz \
] $ps

set m3vit [create_bd_cell -type ip -vlnv m3vit:hls:${project_name}:1.0 ${project_name}_0]
set reset [create_bd_cell -type ip -vlnv xilinx.com:ip:proc_sys_reset reset_0]
set clock [get_bd_pins zynq_ps/pl_clk0]
connect_bd_net $clock [get_bd_pins reset_0/slowest_sync_clk] [get_bd_pins ${project_name}_0/ap_clk]
connect_bd_net [get_bd_pins zynq_ps/pl_resetn0] [get_bd_pins reset_0/ext_reset_in]
connect_bd_net [get_bd_pins reset_0/peripheral_aresetn] [get_bd_pins ${project_name}_0/ap_rst_n]

# Registers.
set control [create_bd_cell -type ip -vlnv xilinx.com:ip:smartconnect control]
set_property CONFIG.NUM_SI {1} $control
connect_bd_intf_net [get_bd_intf_pins zynq_ps/M_AXI_HPM0_FPD] [get_bd_intf_pins control/S00_AXI]
connect_bd_intf_net [get_bd_intf_pins control/M00_AXI] [get_bd_intf_pins ${project_name}_0/s_axi_control]
connect_bd_net $clock [get_bd_pins control/aclk] [get_bd_pins zynq_ps/maxihpm0_fpd_aclk]
connect_bd_net [get_bd_pins reset_0/peripheral_aresetn] [get_bd_pins control/aresetn]

# Memory: weights, which the array waits for, have ports of their own; so have keys and narrow_in, through which inputs are
# read at the same time. Reading and writing do not disturb each other.
foreach {port masters} {HP0 {weights} HPC0 {more_weights} HP1 {narrow_in io} HP2 {keys narrow_out} HP3 {wide} HPC1 {more_wide tables}} {
    set name memory_[string tolower $port]
    set connect [create_bd_cell -type ip -vlnv xilinx.com:ip:smartconnect $name]
    set_property CONFIG.NUM_SI [llength $masters] $connect
    set place 0
    foreach master $masters {
        connect_bd_intf_net [get_bd_intf_pins ${project_name}_0/m_axi_$master] [get_bd_intf_pins $name/S0${place}_AXI]
        incr place
    }
    connect_bd_intf_net [get_bd_intf_pins $name/M00_AXI] [get_bd_intf_pins zynq_ps/S_AXI_${port}_FPD]
    connect_bd_net $clock [get_bd_pins $name/aclk] [get_bd_pins zynq_ps/saxi[string tolower $port]_fpd_aclk]
    connect_bd_net [get_bd_pins reset_0/peripheral_aresetn] [get_bd_pins $name/aresetn]
}
assign_bd_address
validate_bd_design
save_bd_design
make_wrapper -files [get_files design_1.bd] -top -import

if {[info exists argv] && "bitstream" in $argv} {
    launch_runs impl_1 -to_step write_bitstream -jobs 4
    wait_on_run impl_1
    file copy -force [glob [file join $here m3vit_vivado m3vit_vivado.runs impl_1 *.bit]] [file join $here m3vit.bit]
    set hwh [glob [file join $here m3vit_vivado m3vit_vivado.gen sources_1 bd design_1 hw_handoff *.hwh]]
    file copy -force $hwh [file join $here m3vit.hwh]
}
